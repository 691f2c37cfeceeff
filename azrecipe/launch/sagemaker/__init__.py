"""SageMaker: the same recipe as a training job. `submit` and what it returns may be used from a notebook.

Importing this needs nothing but azrecipe; submitting needs the extra: pip install 'azrecipe[sagemaker]'.
"""

from azrecipe.launch.sagemaker.jobs import Job, attach, fetch, logs, status, stop
from azrecipe.launch.sagemaker.settings import Settings, load
from azrecipe.launch.sagemaker.submitting import Submission, requests, submit

__all__ = ["Job", "Settings", "Submission", "attach", "fetch", "load", "logs", "requests", "status", "stop", "submit"]
