#!/usr/bin/env python3
"""Sends a mail and reads it again, by SMTP, IMAP and POP3. No TLS here: that is truename's part.

    mail.py [SMTP IMAP POP3]: three HOST:PORT
"""
import imaplib
import os
import poplib
import smtplib
import sys

servers = sys.argv[1:] or ["127.0.0.1:5870", "127.0.0.1:1430", "127.0.0.1:1100"]
at_smtp, at_imap, at_pop3 = [server.split(":") for server in servers]
user, password = os.environ.get("MAIL_USER", "app"), os.environ.get("MAIL_PASSWORD", "secret")
mail = "From: app@example.com\r\nTo: ops@example.com\r\nSubject: nightly report\r\n\r\nall is well\r\n"

with smtplib.SMTP(*at_smtp, timeout=15) as smtp:
    smtp.login(user, password)
    smtp.sendmail("app@example.com", ["ops@example.com"], mail)
    print("sent")

imap = imaplib.IMAP4(*at_imap, timeout=15)
imap.login(user, password)
imap.append("INBOX", None, None, mail.encode())
_, [count] = imap.select("INBOX", readonly=True)
_, [(_, subject), *_] = imap.fetch("1", "(BODY[HEADER.FIELDS (SUBJECT)])")
print(f"IMAP: {int(count)} in the inbox, {subject.decode().strip()}")
imap.logout()

pop3 = poplib.POP3(*at_pop3, timeout=15)
pop3.apop(user, password)  # The server's timestamp has come through.
print(f"POP3: {len(pop3.list()[1])} in the inbox")
pop3.quit()
