"""What is measured, and how: each benchmark prints a table and can write JSON. May import both packages."""
