"""Why an op is sensitive."""
