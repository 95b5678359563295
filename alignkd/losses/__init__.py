"""The terms of the objective, and the recipes that weigh them."""
