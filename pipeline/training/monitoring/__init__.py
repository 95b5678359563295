"""What a run logs while it trains: metrics, TensorBoard, and warnings about what looks wrong."""
