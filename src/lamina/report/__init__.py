"""One page that shows a plan to people: what was asked, what came of it, and why."""
