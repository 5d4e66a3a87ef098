"""The training of e2e_utils on Ray, from the experiment YAMLs of determined_files.

train.py is one training on several workers, tune.py a search, rayjob.yaml starts the
former on Kubernetes. Nothing here needs Determined to be installed.
"""
