"""Goals → forms: which ranks are possible, what they cost on this machine, and which one is taken."""
