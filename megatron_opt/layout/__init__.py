"""One description of a model: its parameters, their logical matrices, roles, names and the sides that ranks cut."""
