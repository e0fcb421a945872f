"""How anything reaches people: exit codes and one-line errors, safe text, sizes, pictures."""
