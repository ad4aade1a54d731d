"""How well a model retrieves from somebody's own documents."""
