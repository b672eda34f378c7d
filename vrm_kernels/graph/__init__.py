"""What every backend and every process shares of a relation graph: its constants, its pruning, its selection."""
