# What can be done here besides tests; see CONTRIBUTING.md.

.PHONY: report

report: ## lines per family, fields by number of users, lines that stand twice
	python scripts/report.py
