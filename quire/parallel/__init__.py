"""Processes that compute one network together: who they are (mesh, axis) and how they exchange tensors.

Knows no layer, no model and no request. Layers get an Axis and never ask how large it is; `communicators` makes the
axes of a process. A new way to exchange tensors is a class like `Communicator` (axis.py) and a place in `factory.py`.
"""
