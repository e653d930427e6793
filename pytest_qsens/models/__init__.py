"""From the name a user gives to a loadable model with its batches."""
