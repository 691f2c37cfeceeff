"""The AWS account: credentials, role, bucket, and AWS errors."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from azrecipe.errors import AzrecipeError, CannotRun, CommandError
from azrecipe.recipe.extras import get_install_command, list_missing_modules
from azrecipe.sagemaker.settings import SageMakerSettings
from azrecipe.utils.console import print_progress

PLACEHOLDER_ACCOUNT_ID = "000000000000"  # the account of a dry run without credentials
ACCESS_DENIED_CODES = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403", "Forbidden")
EXPIRED_CREDENTIALS_CODES = (
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "SignatureDoesNotMatch",
)


@dataclass(frozen=True)
class Account:
    """The account and region of a job.

    Attributes:
        session: The boto3 session.
        account_id: The account ID, 12 digits.
        region: The AWS region.
        authenticated: Whether there are credentials. Without them the account is a placeholder and AWS is not called.
    """

    session: Any
    account_id: str
    region: str
    authenticated: bool = True


def check_packages_installed() -> None:
    """Check that the sagemaker extra is installed. Raises CannotRun."""
    missing = list_missing_modules("sagemaker")
    if missing:
        raise CannotRun(f"{' and '.join(missing)} is not installed: {get_install_command('sagemaker')}")


def open_account(region: str | None, dry_run: bool = False) -> Account:
    """Open the account of the current credentials.

    Args:
        region: The AWS region; None for that of the profile.
        dry_run: Whether missing credentials or regions are replaced by placeholders.

    Raises:
        CannotRun: There are no credentials, or AWS refuses them.
        CommandError: The profile or the region is missing.
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
            raise CommandError("no AWS region: set region: in the settings, --region, or AWS_REGION")
        region = "us-east-1"
    if session.get_credentials() is None:
        if not dry_run:
            with translate_aws_errors("AWS"):
                raise NoCredentialsError
        return Account(boto3.Session("nobody", "nobody", region_name=region), PLACEHOLDER_ACCOUNT_ID, region, authenticated=False)
    with translate_aws_errors("sts:GetCallerIdentity"):
        return Account(session, session.client("sts", region_name=region).get_caller_identity()["Account"], region)


def resolve_settings(settings: SageMakerSettings, account: Account) -> SageMakerSettings:
    """Fill in the role's ARN and the bucket's name, and check both.

    Raises:
        CommandError: The role, the bucket or the secret does not exist.
        CannotRun: The account may not use one of them.
    """
    bucket = settings.bucket.replace("{account}", account.account_id).replace("{region}", account.region)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", bucket):
        raise CommandError(
            f"bucket: {bucket} is not a valid bucket name (3 to 63 of a-z, 0-9, '-' and '.'; {{account}} and {{region}} are filled in)"
        )
    if not account.authenticated:
        role = settings.role if settings.role.startswith("arn:") else f"arn:aws:iam::{account.account_id}:role/{settings.role}"
        return replace(settings, role=role, bucket=bucket)
    problems: list[AzrecipeError] = []
    role = settings.role
    for check in (
        lambda: _check_bucket(bucket, account),
        lambda: _check_secret(settings.hub_token_secret, account),
        lambda: _resolve_role(settings.role, account),
    ):
        try:
            role = check() or role
        except AzrecipeError as error:
            problems.append(error)
    if problems:
        kind = CommandError if any(isinstance(problem, CommandError) for problem in problems) else CannotRun
        raise kind("\n".join(map(str, problems)))
    return replace(settings, role=role, bucket=bucket)


def _resolve_role(role: str, account: Account) -> str:
    """Look up a role's ARN. Without iam:GetRole, build it from the name."""
    from botocore.exceptions import ClientError

    name = role.rpartition("/")[2]
    try:
        arn: str = account.session.client("iam").get_role(RoleName=name)["Role"]["Arn"]
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "NoSuchEntity":
            raise CommandError(
                f"role: there is no role {name} in account {account.account_id}. docs/sagemaker.md has the command that creates it"
            ) from None
        if code in ACCESS_DENIED_CODES:  # submitting needs iam:PassRole, not this
            print_progress(f"role: not checked whether {name} exists: iam:GetRole is not allowed")
            return role if role.startswith("arn:") else f"arn:aws:iam::{account.account_id}:role/{role}"
        raise convert_aws_error(error, f"iam:GetRole {name}") from None
    if role.startswith("arn:") and arn != role:
        raise CommandError(f"role: {role} does not exist; the account has {arn}")
    return arn


def _check_secret(name: str | None, account: Account) -> None:
    """Check that the token's secret exists, without reading its value."""
    from botocore.exceptions import ClientError

    if name is None:
        return
    region = name.split(":")[3] if name.startswith("arn:") else account.region
    try:
        account.session.client("secretsmanager", region_name=region).describe_secret(SecretId=name)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code == "ResourceNotFoundException":
            raise CommandError(
                f"hub_token_secret: there is no secret {name} in {region}: aws secretsmanager create-secret --name {name} "
                "--secret-string file://token.txt, or hub_token_secret: null where no model needs a token"
            ) from None
        if code not in ACCESS_DENIED_CODES:
            raise convert_aws_error(error, f"secretsmanager:DescribeSecret {name}") from None
        print_progress(f"hub_token_secret: not checked whether {name} exists: secretsmanager:DescribeSecret is not allowed")


def _check_bucket(bucket: str, account: Account) -> None:
    from botocore.exceptions import ClientError

    s3 = account.session.client("s3", region_name=account.region)
    try:
        response = s3.head_bucket(Bucket=bucket, ExpectedBucketOwner=account.account_id)
        region = response.get("BucketRegion") or response["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    except ClientError as error:
        code = error.response["Error"]["Code"]
        region = error.response["ResponseMetadata"].get("HTTPHeaders", {}).get("x-amz-bucket-region")
        if code in ("404", "NoSuchBucket"):
            raise CommandError(f"bucket: there is no bucket {bucket}: aws s3 mb s3://{bucket} --region {account.region}") from None
        if code in ("403", "AccessDenied"):
            raise CannotRun(
                f"bucket: {bucket} may not be used by this account ({account.account_id}): it belongs to another account, or s3:ListBucket is not allowed on it (docs/sagemaker.md has the policy)"
            ) from None
        if code not in ("301", "PermanentRedirect", "400"):
            raise convert_aws_error(error, f"s3:HeadBucket {bucket}") from None
    if region is not None and region != account.region:
        raise CommandError(
            f"bucket: {bucket} is in {region} and the job would run in {account.region}: SageMaker reads buckets of its own region only. "
            f"Set region: {region}, or name a bucket in {account.region}"
        )


@contextlib.contextmanager
def translate_aws_errors(action: str) -> Iterator[None]:
    """Convert errors of AWS and its SDK for the user.

    Other exceptions pass through.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except Boto3Error as error:  # wraps the error of an upload
        reason = error.__context__
        raise convert_aws_error(reason if isinstance(reason, ClientError | BotoCoreError) else error, action) from None
    except (ClientError, BotoCoreError) as error:
        raise convert_aws_error(error, action) from None


def convert_aws_error(error: Exception, action: str) -> AzrecipeError:
    """Convert an AWS error into one that names the remedy."""
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

    if isinstance(error, NoCredentialsError):
        return CannotRun(
            "no AWS credentials: aws configure (or aws sso login), AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, EndpointConnectionError):
        return CannotRun(f"{action}: AWS cannot be reached: {error}")
    if not isinstance(error, ClientError):
        return CannotRun(f"{action}: {error}")
    code, message = error.response["Error"].get("Code", ""), " ".join(error.response["Error"].get("Message", "").split())
    if code in EXPIRED_CREDENTIALS_CODES:
        return CannotRun(f"{action}: the AWS credentials are no longer valid ({code}): log in again (aws sso login), or check AWS_PROFILE")
    if code in ACCESS_DENIED_CODES:
        return CannotRun(f"{action}: AWS does not allow it: {message or code}. docs/sagemaker.md has the policy that is needed")
    if code in ("ResourceLimitExceeded", "LimitExceededException", "ServiceQuotaExceededException"):
        return CannotRun(
            f"{action}: the account's quota does not allow it: {message} Ask for more in Service Quotas, Amazon SageMaker ('… for training job usage', "
            "or '… for spot training job usage'), or take another instance type or count. The next submission uses what was uploaded"
        )
    if code in ("CapacityError", "InsufficientCapacity", "CapacityErrorException"):
        return CannotRun(f"{action}: AWS has no free machines of this type now: {message} Try again later, another region, or spot")
    if code in ("ThrottlingException", "Throttling", "RequestLimitExceeded"):
        return CannotRun(f"{action}: AWS limits the rate of requests: {message} Try again in a minute")
    if code in ("ValidationException", "ResourceNotFound", "ResourceInUse", "ResourceNotFoundException"):
        return CommandError(f"{action}: AWS refuses: {message}")
    return CannotRun(f"{action}: {code}: {message}")
