"""Draws the embedded data set: scenes and labels in the shape of xView."""
