"""What the tables in the documentation are made with."""
