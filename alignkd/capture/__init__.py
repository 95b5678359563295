"""What is recorded of a forward pass: attention of some layers, vision tokens, hidden states at answers."""
