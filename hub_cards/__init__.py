"""The public side: the model card of a converted checkpoint and its way to the Hub. No torch here."""
