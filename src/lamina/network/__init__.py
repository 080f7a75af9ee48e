"""Reading and editing somebody's model: what layers there are, how an example uses them, and putting others in their place."""
