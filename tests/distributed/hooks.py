"""What a case may do inside its ranks before training: each takes (case, record, argv, folder)."""
