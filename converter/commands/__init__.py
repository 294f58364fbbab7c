"""The commands, one module each: the only place where converter, calibrator and hub_cards meet."""
