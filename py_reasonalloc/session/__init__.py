"""`ReasonLlama`: its configuration, its texts, and how its compressions are watched."""
