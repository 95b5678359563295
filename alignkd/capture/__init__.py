"""What is recorded of a forward pass: attention of chosen layers, vision tokens, hidden states at answers."""
