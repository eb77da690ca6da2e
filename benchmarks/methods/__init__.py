"""Initialisations, formulas and training rules beside plain LoRA, each at its own learning rate."""
