"""The process that sees every report: it checks what is asked for, collects results, judges, and alone writes files."""
