"""The training of e2e_utils as a trial on a Determined cluster.

model_def.py holds the trial and train.py runs it, here or there; core_api.py does the
same by the Core API, without a trial class; load.py brings checkpoints back. The folder
is also a context directory that `det e create` uploads, so its modules find each other
both as `determined_files.model_def` and as `model_def`.
"""
