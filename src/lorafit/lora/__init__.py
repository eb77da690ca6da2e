"""The method: formulas, initialisations, and putting them into a model."""
