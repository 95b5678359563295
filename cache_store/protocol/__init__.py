"""What keeps a cache consistent: manifest, plan and commit records; write, read, verify, repair and convert a cache."""
