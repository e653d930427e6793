"""From options to test items: what is measured by which test, and what is collected told to the controller."""
