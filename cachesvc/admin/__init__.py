"""HTTP for operators: health, metrics, status; off the data path."""
