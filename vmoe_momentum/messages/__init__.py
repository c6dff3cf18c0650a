"""What users are told when something ends or is refused: one line that names setting, value and way out."""
