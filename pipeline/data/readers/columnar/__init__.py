"""Arrow and Parquet tables: columns, rows, and what is copied of them. All of it needs pyarrow."""
