"""The methods, by name: each module has one function ``calibrate(problem) -> steps`` that moves the scales.

A method asks ``problem.validation`` to judge iterates; the best of them is the result, whatever the method.
Methods that need neither model nor text have ``scales_without_data`` instead, in plain NumPy.
"""

METHODS = {
    "gradient": "calibrator.methods.gradient",
}
