"""What is asked: problems, methods, and the row that one text makes."""
