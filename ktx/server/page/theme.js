// Before the first paint, so that a page that was switched to dark does not flash. The one script that is no module.
"use strict";
{
  let theme = "";
  try {
    theme = localStorage.getItem("ktx.theme") ?? "";
  } catch {
    theme = ""; // a browser that keeps nothing
  }
  if (theme) document.documentElement.dataset.theme = theme;
}
