"""Images, the tasks they are divided into, and the batches a method sees."""
