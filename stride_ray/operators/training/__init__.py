"""The paper's way to operators: three losses, descended together on Ray Train."""
