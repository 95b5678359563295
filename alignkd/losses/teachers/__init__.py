"""What belongs to one teacher in the objective, and the average over several teachers."""
