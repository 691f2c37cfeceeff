"""Knows the AWS account: who is asking, whether the role and the bucket are there, and what AWS' refusals mean for a user."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from azrecipe.errors import AzrecipeError, CannotRun, CommandError
from azrecipe.sagemaker.settings import Settings

NOBODY = "000000000000"  # the account in a dry run where nobody is logged in
DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403", "Forbidden")
EXPIRED = (
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "SignatureDoesNotMatch",
)


@dataclass(frozen=True)
class Account:
    """Where a job goes: boto3's session, the account's number, the region. known: whether AWS was asked."""

    session: Any
    number: str
    region: str
    known: bool = True


def needed() -> None:
    """Raise CannotRun where the extra is not installed."""
    missing = [name for name in ("boto3", "sagemaker.train") if _absent(name)]
    if missing:
        raise CannotRun(f"{' and '.join(missing)} is not installed: pip install 'azrecipe[sagemaker]'")


def _absent(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True


def account(region: str | None, dry_run: bool = False) -> Account:
    """The account that the credentials belong to; region: None for the one of the profile. In a dry run without credentials a made-up one.

    Raises CannotRun, CommandError.
    """
    import boto3
    from botocore.exceptions import NoCredentialsError, ProfileNotFound

    try:
        session = boto3.Session(region_name=region or os.environ.get("AWS_REGION"))
    except ProfileNotFound as error:
        raise CommandError(f"{error}: AWS_PROFILE names no profile of ~/.aws/config") from None
    region = session.region_name
    if not region:
        if not dry_run:
            raise CommandError("no AWS region: say region: in the settings, --region, or AWS_REGION")
        region = "us-east-1"
    if session.get_credentials() is None:
        if not dry_run:
            with explained("AWS"):
                raise NoCredentialsError
        return Account(boto3.Session("nobody", "nobody", region_name=region), NOBODY, region, known=False)
    with explained("sts:GetCallerIdentity"):
        return Account(session, session.client("sts", region_name=region).get_caller_identity()["Account"], region)


def resolved(settings: Settings, where: Account) -> Settings:
    """The settings with the role's ARN and the bucket's name. Raises CommandError, CannotRun where either is not there or cannot be used."""
    bucket = settings.bucket.replace("{account}", where.number).replace("{region}", where.region)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise CommandError(
            f"bucket: {bucket} is no name of a bucket (3 to 63 of a-z, 0-9, '-' and '.'; {{account}} and {{region}} are put in)"
        )
    if not where.known:
        role = settings.role if settings.role.startswith("arn:") else f"arn:aws:iam::{where.number}:role/{settings.role}"
        return replace(settings, role=role, bucket=bucket)
    problems: list[AzrecipeError] = []
    role = settings.role
    for check in (
        lambda: _check_bucket(bucket, where),
        lambda: _check_secret(settings.hub_token_secret, where),
        lambda: _role(settings.role, where),
    ):
        try:
            role = check() or role
        except AzrecipeError as error:
            problems.append(error)
    if problems:
        kind = CommandError if any(isinstance(problem, CommandError) for problem in problems) else CannotRun
        raise kind("\n".join(map(str, problems)))
    return replace(settings, role=role, bucket=bucket)


def _role(role: str, where: Account) -> str:
    """A role's ARN. Without the right to look, the one that it must have."""
    from botocore.exceptions import ClientError

    name = role.rpartition("/")[2]
    try:
        found: str = where.session.client("iam").get_role(RoleName=name)["Role"]["Arn"]
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchEntity":
            raise CommandError(
                f"role: there is no role {name} in account {where.number}. docs/sagemaker.md makes it in one command"
            ) from None
        if code in DENIED:  # submitting needs iam:PassRole, not this
            _note(f"role: whether {name} is there was not looked at: iam:GetRole is not allowed")
            return role if role.startswith("arn:") else f"arn:aws:iam::{where.number}:role/{role}"
        raise refusal(error, f"iam:GetRole {name}") from None
    if role.startswith("arn:") and found != role:
        raise CommandError(f"role: {role} is not there; the account has {found}")
    return found


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_secret(name: str | None, where: Account) -> None:
    """That the token's secret is there; its content is not asked for."""
    from botocore.exceptions import ClientError

    if name is None:
        return
    region = name.split(":")[3] if name.startswith("arn:") else where.region
    try:
        where.session.client("secretsmanager", region_name=region).describe_secret(SecretId=name)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "ResourceNotFoundException":
            raise CommandError(
                f"hub_token_secret: there is no secret {name} in {region}: aws secretsmanager create-secret --name {name} "
                "--secret-string file://token.txt, or hub_token_secret: null where no model needs a token"
            ) from None
        if code not in DENIED:
            raise refusal(error, f"secretsmanager:DescribeSecret {name}") from None
        _note(f"hub_token_secret: whether {name} is there was not looked at: secretsmanager:DescribeSecret is not allowed")


def _check_bucket(bucket: str, where: Account) -> None:
    from botocore.exceptions import ClientError

    s3 = where.session.client("s3", region_name=where.region)
    try:
        said = s3.head_bucket(Bucket=bucket, ExpectedBucketOwner=where.number)
        region = said.get("BucketRegion") or said["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    except ClientError as error:
        code = error.response["Error"]["Code"]
        region = error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
        if code in ("404", "NoSuchBucket"):
            raise CommandError(f"bucket: there is no bucket {bucket}: aws s3 mb s3://{bucket} --region {where.region}") from None
        if code in ("403", "AccessDenied"):
            raise CannotRun(
                f"bucket: {bucket} may not be used by this account ({where.number}): it is another account's, or s3:ListBucket is not allowed on it (docs/sagemaker.md has the policy)"
            ) from None
        if code not in ("301", "PermanentRedirect", "400"):
            raise refusal(error, f"s3:HeadBucket {bucket}") from None
    if region is not None and region != where.region:
        raise CommandError(
            f"bucket: {bucket} is in {region} and the job would run in {where.region}: SageMaker reads buckets of its own region only. "
            f"Say region: {region}, or name a bucket of {where.region}"
        )


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """AWS' and the SDK's errors as one line that says what to do; nothing else is caught."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except Boto3Error as error:  # an upload's, around the reason
        reason = error.__context__
        raise refusal(reason if isinstance(reason, ClientError | BotoCoreError) else error, doing) from None
    except (ClientError, BotoCoreError) as error:
        raise refusal(error, doing) from None


def refusal(error: Exception, doing: str) -> AzrecipeError:
    """What to tell of a refusal by AWS."""
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

    if isinstance(error, NoCredentialsError):
        return CannotRun(
            "no AWS credentials: aws configure (or aws sso login), AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, EndpointConnectionError):
        return CannotRun(f"{doing}: AWS cannot be reached: {error}")
    if not isinstance(error, ClientError):
        return CannotRun(f"{doing}: {error}")
    code, message = error.response["Error"].get("Code", ""), " ".join(error.response["Error"].get("Message", "").split())
    if code in EXPIRED:
        return CannotRun(f"{doing}: the AWS credentials are no longer good ({code}): log in again (aws sso login), or look at AWS_PROFILE")
    if code in DENIED:
        return CannotRun(f"{doing}: AWS does not allow it: {message or code}. docs/sagemaker.md has the policy that is needed")
    if code in ("ResourceLimitExceeded", "LimitExceededException", "ServiceQuotaExceededException"):
        return CannotRun(
            f"{doing}: the account's quota does not allow it: {message} Ask for more in Service Quotas, Amazon SageMaker ('… for training job usage', "
            "or '… for spot training job usage'), or take another instance type or count. What was uploaded is used again"
        )
    if code in ("CapacityError", "InsufficientCapacity", "CapacityErrorException"):
        return CannotRun(f"{doing}: AWS has no such machines free now: {message} Try again later, another region, or spot")
    if code in ("ThrottlingException", "Throttling", "RequestLimitExceeded"):
        return CannotRun(f"{doing}: AWS asks to go slower: {message} Try again in a minute")
    if code in ("ValidationException", "ResourceNotFound", "ResourceInUse", "ResourceNotFoundException"):
        return CommandError(f"{doing}: AWS refuses: {message}")
    return CannotRun(f"{doing}: {code}: {message}")
