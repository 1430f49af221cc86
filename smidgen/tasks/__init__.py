"""What is learnt: one folder a task, and what several share."""
