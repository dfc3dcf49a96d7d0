"""Who rates answers: model judges, word lists, people; single answers and pairs."""
