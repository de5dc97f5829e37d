"""The paper's training of operators: joint gradient descent on three losses, on Ray Train."""
