"""``python -m converter`` is ``mmod-convert``, for launchers such as torchrun."""

from converter.commands.cli import convert_main

if __name__ == "__main__":
    convert_main()
