"""Mails on their way out: written (``letters.py``), handed over (``transports.py``), and who sees to it (``mailer.py``)."""
