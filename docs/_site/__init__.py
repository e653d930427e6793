"""What builds the site, and reads its pages in tests."""
