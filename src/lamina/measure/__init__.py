"""What things cost: parameters and MACs by counting, milliseconds by the clock."""
