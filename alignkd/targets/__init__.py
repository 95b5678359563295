"""What the teacher gives for a batch, and how it becomes targets of this student."""
