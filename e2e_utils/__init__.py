"""Helpers of the notebooks: one module a stage, from satellite scene to served box.

sample -> convert -> tiling -> (storage) -> data -> train (models, evaluate)
-> predict -> export. Each module can be copied on its own; its first line says
what to copy with it.
"""
