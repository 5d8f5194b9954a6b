document.documentElement.classList.add("scripted");  // before anything is drawn: report.css hides what needs scripts without it
