"""Training on Ray, from the experiment YAMLs of determined_files, and prediction.

train.py is one training on several workers, tune.py a search, predict.py takes a
detector over an archive of scenes. rayjob.yaml and rayjob-predict.yaml start the first
and the last on Kubernetes. Nothing here needs Determined to be installed.
"""
