"""Files of data: their names, their bytes by range, and what is unpacked of them."""
