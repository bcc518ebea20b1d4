"""What users import and type: the client of an Interplay service."""
